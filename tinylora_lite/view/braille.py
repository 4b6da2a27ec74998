"""Drawing with braille characters: eight dots in the place of one letter."""

from __future__ import annotations

from rich.text import Text


class Canvas:
    """A grid of braille characters: ``2 · width`` by ``4 · height`` dots, a style for each character."""

    _DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = max(1, width), max(1, height)
        self._cells: dict[tuple[int, int], tuple[int, str]] = {}

    def dot(self, x: int, y: int, style: str = "") -> None:
        """One dot; x grows to the right and y downwards. Dots outside the grid are left out."""
        if 0 <= x < 2 * self.width and 0 <= y < 4 * self.height:
            place = (y // 4, x // 2)
            bits, _ = self._cells.get(place, (0, ""))
            self._cells[place] = (bits | self._DOTS[y % 4][x % 2], style)

    def line(self, x0: int, y0: int, x1: int, y1: int, style: str = "") -> None:
        """A straight line of dots, its ends included."""
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(count + 1):
            self.dot(round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count), style)

    def rows(self) -> list[Text]:
        """The grid as lines of text."""
        lines = []
        for row in range(self.height):
            line = Text()
            for column in range(self.width):
                bits, style = self._cells.get((row, column), (0, ""))
                line.append(chr(0x2800 + bits) if bits else " ", style)
            lines.append(line)
        return lines
