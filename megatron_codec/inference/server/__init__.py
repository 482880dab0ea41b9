"""The generation server: HTTP in front of `EngineLoop`. Read `app.py` first, then `completions.py`."""
