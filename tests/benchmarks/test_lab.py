"""benchmarks.papers.lab: what a page keeps when its tables are made again."""

from benchmarks.papers.lab import write_section


def test_a_section_is_replaced_the_others_and_what_a_person_wrote_below_it_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## One\n\nold table\n\n### By hand\n\nprose\n\n## Two\n\nother\n",
        encoding="utf-8",
    )
    write_section("One", "new table", page)
    assert (
        page.read_text()
        == "# Page\n\n## One\n\nnew table\n\n### By hand\n\nprose\n\n## Two\n\nother\n"
    )
    write_section("Two", "another", page)
    write_section("Three", "third", page)
    assert page.read_text().endswith("prose\n\n## Two\n\nanother\n\n## Three\n\nthird\n")
