"""`python -m stable_diffusion.keys NAME` makes an API key. The command itself is in `server/access/keys.py`."""

from __future__ import annotations

from stable_diffusion.server.access.keys import main

if __name__ == "__main__":
    main()
