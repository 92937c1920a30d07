"""A terminal as its user sees it. No tests."""

import io
import re

_PIECE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(text: str, columns: int) -> list[str]:
    """The lines on a terminal of that many columns and any height, up to the last that is not blank."""
    lines, row, column = [""], 0, 0
    for code, letter, control, plain in _PIECE.findall(text):
        if letter == "A":
            row -= int(code or 1)
        elif letter == "K":
            assert code in ("", "2")  # the rest of the line, or all of it
            lines[row] = "" if code else lines[row][:column]
        elif letter:
            assert letter in "mhl", letter  # colors, and the cursor that is hidden
        elif control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        for character in plain:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")
