"""The builder of offline bundles; `deploy/bundle/build.py` is its command."""
