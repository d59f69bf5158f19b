"""`python -m stable_diffusion.keys NAME` makes an API key: a short name for the command, which `server/access/keys.py` is."""

from __future__ import annotations

from stable_diffusion.server.access.keys import main

if __name__ == "__main__":
    main()
