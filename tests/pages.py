"""The pages of docs/, whose Python examples run one after the other in one namespace."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(path: Path) -> dict[str, object]:
    """What the examples of a page define; raises what they raise, whose traceback has the page's line."""
    page = path.read_text()
    examples = list(_PYTHON.finditer(page))
    if len(examples) != page.count("```python"):
        raise ValueError(f"an example of {path} does not start at the margin, or does not end")
    namespace: dict[str, object] = {"__name__": path.stem}
    for example in examples:
        lines_before = page.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], str(path), "exec"), namespace)
    return namespace
