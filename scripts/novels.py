#!/usr/bin/env python3
"""Fetches 186 English novels of 1839 to 1930 and writes them as text: data for runs whose documents are long.

    python3 scripts/novels.py data/novels
    ttt tokenizer train --data data/novels/train --vocab-size 32000 --out data/novels

OUT/train and OUT/validation hold one file a novel; one in twenty, chosen by a hash of its name, is for validation. The texts come
from two public repositories at fixed commits (needs git; 150 MB): `computationalstylistics/100_english_novels`, and the English
part of the European Literary Text Collection, `COST-ELTeC/ELTeC-eng` (doi 10.5281/zenodo.3533868; TEI, of which the text is kept).
Novels after 1930 and those that lie in both are left out. The same files come out everywhere: the last line printed is a hash
of them all. All were published by 1930 and are in the public domain in the United States; some authors died later than 1955.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zlib

SOURCES = [
    ("https://github.com/computationalstylistics/100_english_novels", "143e601875d70e195f2cc5ebd8b034609271194d", "corpus"),
    ("https://github.com/COST-ELTeC/ELTeC-eng", "3db3b6738a836f0e1b276b6c9703e42f4297f978", "level1"),
]
# Later than 1930; then what the first collection has too.
LEFT_OUT = """Galsworthy_River_1933 Woolf_Years_1937
    ENG18460_Reynolds ENG18530_Dickens ENG18551_Trollope ENG18621_Braddon ENG18640_Blackmore ENG18660_Eliot ENG18840_Lee
    ENG18972_Morris ENG19080_Chesterton ENG19100_Forster ENG19192_Woolf ENG19200_Lawrence""".split()
TEI = "{http://www.tei-c.org/ns/1.0}"
VALIDATION = 20


def git(repository, *arguments):
    return subprocess.run(["git", "-C", repository, *arguments], check=True, stdout=subprocess.PIPE).stdout


def clone(url, commit, into):
    git(into, "init", "--quiet", "--bare")
    git(into, "fetch", "--quiet", "--depth", "1", url, commit)
    return into


def plain(name, contents):
    """The text of a file: as it is, or headings, paragraphs and lines of verse of a TEI document's body."""
    if name.endswith(".txt"):
        return contents.decode().removeprefix("\ufeff").replace("\r\n", "\n").strip() + "\n"
    body = ElementTree.fromstring(contents).find(f"{TEI}text/{TEI}body")
    parts = (" ".join("".join(e.itertext()).split()) for e in body.iter() if e.tag in (TEI + "head", TEI + "p", TEI + "l"))
    return "\n\n".join(filter(None, parts)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--clone", nargs=2, metavar="GIT_DIR", help="clones of the two repositories that are there already")
    arguments = parser.parse_args()
    for side in ("train", "validation"):
        (arguments.out / side).mkdir(parents=True, exist_ok=True)
    total, digest = 0, hashlib.sha256()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (url, commit, folder) in enumerate(SOURCES):
            if arguments.clone:
                repository = arguments.clone[number]
            else:
                repository = pathlib.Path(scratch, str(number))
                repository.mkdir()
                print(f"fetching {url}", file=sys.stderr)
                clone(url, commit, repository)
            for path in sorted(git(repository, "ls-tree", "-r", "-z", "--name-only", commit, folder + "/").decode().split("\0")):
                stem = pathlib.PurePosixPath(path).stem
                if not path.endswith((".txt", ".xml")) or stem in LEFT_OUT:
                    continue
                text = plain(path, git(repository, "show", f"{commit}:{path}")).encode()
                side = "validation" if zlib.crc32(path.encode()) % VALIDATION == 0 else "train"
                (arguments.out / side / f"{stem}.txt").write_bytes(text)
                total += 1
                digest.update(text)
    print(f"{total} novels in {arguments.out}, sha256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
