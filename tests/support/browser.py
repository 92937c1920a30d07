"""A page in a real browser: headless Chromium, without a network. No tests."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser, None where none is installed."""

_LOOK = """
<script>
addEventListener("load", () => {
  const images = [...document.images].map((each) => [each.alt, each.naturalWidth, each.currentSrc]);
  const loaded = performance.getEntriesByType("resource").map((each) => each.name);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const seen = document.createElement("pre");
  seen.id = "seen";
  seen.textContent = JSON.stringify({images, loaded, wide});
  document.body.append(seen);
});
</script>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a browser made of a page.

    Attributes:
        images: by their alternative text, the width in pixels (0 where it could not be loaded) and where it is from.
        loaded: addresses of whatever was requested beside the page itself and what is in it.
        console: lines of the console.
        wide: whether the page must be scrolled sideways.
    """

    images: dict[str, tuple[int, str]]
    loaded: list[str]
    console: list[str]
    wide: bool


def look_at(page: Path, *, dark: bool = False, width: int = 1000) -> Seen:
    """Opens a copy of the page, with a script in it that reports what was loaded."""
    assert CHROMIUM is not None
    copy = page.with_name(f"looked-at-{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_LOOK}</body>"), encoding="utf-8")
    profile = page.parent / "browser"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--window-size={width},800"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    try:
        done = subprocess.run(
            [CHROMIUM, *flags, copy.as_uri()], capture_output=True, encoding="utf-8", timeout=120, check=True
        )
    finally:
        copy.unlink()
        shutil.rmtree(profile, ignore_errors=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    return Seen(
        images={alt: (width, source) for alt, width, source in seen["images"]},
        loaded=seen["loaded"],
        console=re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr),
        wide=seen["wide"],
    )


def check_page(page: Path, pictures: int) -> None:
    """Demands that a browser shows all pictures, requests nothing and has nothing to say; nothing where none is."""
    if CHROMIUM is None:
        return
    seen = look_at(page)
    assert len(seen.images) == pictures
    assert all(width > 0 for width, _ in seen.images.values())
    assert seen.loaded == []
    assert seen.console == []
    assert not seen.wide
