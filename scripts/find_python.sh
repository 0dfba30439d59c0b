#!/bin/sh
# Print the first Python on PATH that can make AMST's virtual environment: 3.11 or later, with venv and ensurepip.
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done
echo "AMST needs Python 3.11 or later with the venv module (Debian: apt install python3-venv), and none of" >&2
echo "python3, python3.13, python3.12, python3.11 on PATH is that; python3 is: $(python3 --version 2>&1)" >&2
exit 1
