"""The site's pages that stand in the repository's root, and links between them and docs/ (see mkdocs.yml)."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "MODEL_ZOO.md": "MODEL_ZOO.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}
# Not pages, but linked from them.
FILES = [
    "LICENSE",
    "CITATION.cff",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "configs").rglob("*")) if p.suffix in (".yaml", ".py")),
]


def on_files(files, config):
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, page, content=text))
    for source in FILES:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links from docs/ to the root, which is the site's root too."""
    if page.file.src_uri.startswith("api/") or page.file.src_uri in PAGES.values():
        return markdown
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
