"""`python -m deltamerge`."""

from deltamerge.cli import main

main()
