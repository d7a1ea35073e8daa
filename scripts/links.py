"""Checks that each relative link of the documentation names a file, and a heading where it names one."""

import pathlib
import re
import subprocess
import sys

TOP = pathlib.Path(__file__).resolve().parent.parent


def anchors(page):
    """The names by which a page's headings can be linked to, as code hosts and mdBook make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: {file.name} has no such heading"


def main():
    listed = subprocess.run(
        ["find", ".", "-name", "*.md", "-not", "-path", "./.git/*"], cwd=TOP, check=True, capture_output=True, text=True
    )
    found = [(page, fault) for page in sorted(listed.stdout.split()) for fault in broken(TOP / page)]
    for page, fault in found:
        print(f"error: {page}: {fault}")
    sys.exit(bool(found))


main()
