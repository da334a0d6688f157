"""A calibration text of several sources, and sentences that are not in it.

    python -m benchmarks.mixed_text --out text.txt --sentences sentences.txt a.txt docs/*.html dict.dz ...

Cuts every source (.txt, .rst, .html, and each of them gzipped; markup is dropped) into stretches, takes the same
number of characters of each, and shuffles. What we measured with came from four Debian packages: debian-reference-en,
python3.11-doc, dict-gcide and the text of bible-kjv.
"""

import argparse
import gzip
import html
import random
import re
import sys
from pathlib import Path

STRETCH = 4000  # characters, about 1000 tokens: longer than a sequence
HELD = 100  # stretches that only sentences are taken from


def main(arguments: list[str] | None = None) -> int:
    """Writes both files; exit status 2, and one line, on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_text")
    parser.add_argument(
        "sources", type=Path, nargs="+", help="files; those of one folder count as one source"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=2_000_000, help="of each source, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    chooser = random.Random(options.seed)
    stretches: list[str] = []
    try:
        for folder in dict.fromkeys(path.parent for path in options.sources):
            text = "".join(plain(path) for path in options.sources if path.parent == folder)
            own = [text[at : at + STRETCH] for at in range(0, len(text), STRETCH)]
            chooser.shuffle(own)
            stretches += own[: max(1, options.characters // STRETCH)]
        chooser.shuffle(stretches)
        if len(stretches) <= HELD:
            raise ValueError(f"{len(stretches)} stretches of {STRETCH} characters are too little text")
        lines = [line for stretch in stretches[:HELD] for line in sentences(stretch)]
        chooser.shuffle(lines)
        options.out.write_text("\n\n".join(stretches[HELD:]), encoding="utf-8")
        options.sentences.write_text("\n".join(lines[:500]) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"benchmarks.mixed_text: {error}", file=sys.stderr)
        return 2
    print(f"{sum(map(len, stretches[HELD:])):,} characters, {min(500, len(lines))} sentences")
    return 0


def plain(path: Path) -> str:
    """A file's text, without markup."""
    zipped = path.suffix in (".gz", ".dz")
    data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    text = data.decode("utf-8", "replace")
    if ".html" in path.suffixes:
        text = re.sub(r"<(script|style|head)\b.*?</\1>|<[^>]+>", "", text, flags=re.DOTALL)
        text = html.unescape(text)
    return re.sub(r"\n\s*\n+", "\n\n", text)


def sentences(text: str) -> list[str]:
    """A stretch's sentences of 40 to 300 characters; not the first and the last, which are cut."""
    parts = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return [part for part in parts[1:-1] if 40 < len(part) < 300]


if __name__ == "__main__":
    sys.exit(main())
