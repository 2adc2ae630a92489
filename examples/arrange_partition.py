"""Lay out downloaded images as a published partition says (docs/datasets.md, partitions as hashes).

python examples/arrange_partition.py examples/partitions/brain-tumor.csv DOWNLOADED_FOLDER brain-tumor
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import Progress

from fedsecure.cli.display import err, out, show_error
from fedsecure.data.partition_manifest import arrange, read_partition
from fedsecure.errors import FedsecureError


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("source", type=Path, help="folder that holds the images, under any names")
    parser.add_argument("destination", type=Path, help="new folder")
    options = parser.parse_args()
    try:
        rows = read_partition(options.manifest)
        with Progress(console=err, transient=True) as progress:
            task = progress.add_task("reading images", total=None)
            count = arrange(rows, options.source, options.destination, step=lambda n: progress.advance(task, n))
    except FedsecureError as error:
        show_error(error)
        return 1
    out.print(f"{count} files in {options.destination}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
