"""`python -m retnet_tools` is `retnet-tools`."""

from retnet_tools.cli.app import main

main()
