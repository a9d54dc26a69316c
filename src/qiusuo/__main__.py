"""``python -m qiusuo``: the command line."""

from qiusuo.cli import main

main()
