import html.parser

from equalize.commands.report.page import Section, Table, write_page
from equalize.commands.report.style import draw_picture


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def draw(figure):
    figure.subplots().plot([1, 2], [3, 4])


def test_a_page_is_one_file_with_its_pictures_beside_it(tmp_path):
    picture = draw_picture("sigmas", "two <points>", draw, size=(3, 2))
    assert picture.light.startswith(b"\x89PNG")
    assert picture.light != picture.dark
    table = Table(header=("class", "IoU"), rows=(("<b>", "1"),))
    section = Section(heading="a & b", verdict="<script>alert()</script>", pictures=(picture,), table=table, code="<x>")
    text = write_page(tmp_path, "report of <x>", [section]).read_text(encoding="utf-8")
    assert (tmp_path / "sigmas.png").read_bytes() == picture.light
    found = Elements(text).found
    assert [tag for tag, _ in found if tag in ("script", "b", "x")] == []
    places = [value for _, attributes in found for key, value in attributes.items() if key in ("src", "srcset", "href")]
    assert len(places) == 3  # light, dark, no icon
    assert all(place.startswith("data:") for place in places)
