"""The container, run as the platforms run it, on a small case. `./test.sh --container` builds the image and calls check.py."""
