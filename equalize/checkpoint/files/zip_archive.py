"""The zip file that torch.save writes: its directory is checked before anything is unpickled."""

import zipfile
from pathlib import Path

from equalize.errors import CheckpointError

_LARGEST_PICKLE = 1 << 26  # 64 MiB; 30,000 tensors with optimizer state take 20 MiB
_SCRIPT_REMEDY = "save its weights instead: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"


def check_archive(path: Path) -> None:
    """Refuse, by a CheckpointError, an archive of another kind, and one whose members are larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(path, "is truncated or damaged (no zip directory)", remedy="download it again") from error
    inner = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(path, "is a TorchScript archive, which holds code", remedy=_SCRIPT_REMEDY)
    if "data.pkl" not in inner:
        got = ", ".join(repr(member.filename[:60]) for member in members[:3]) or "no members"
        what = "is a zip file but no checkpoint of torch.save (no data.pkl)"
        raise CheckpointError(path, what, got=got, remedy="save its tensors by key with torch.save")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(path, "is a zip file with compressed members, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(path, "promises more bytes than it has", remedy="download it again")
    pickled = max(member.file_size for member in members if member.filename.partition("/")[2] == "data.pkl")
    if pickled > _LARGEST_PICKLE:
        what, expected = f"holds a pickle of {pickled} bytes beside its tensors", f"at most {_LARGEST_PICKLE}"
        raise CheckpointError(path, what, expected=expected, remedy="save the state dict alone with torch.save")


def is_intact(path: Path) -> bool:
    """Whether the pickle in an archive of torch.save has its checksum, so that it is the one that was written.

    False also of what is no zip file, and where torch was told to compute no checksums. A CheckpointError as of
    `check_archive`.
    """
    if not zipfile.is_zipfile(path):
        return False
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        pickled = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
        try:
            return all(archive.read(name) for name in pickled)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError):
            return False
