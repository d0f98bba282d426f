"""What `docker/build.py` puts images together with: packages, wheels, layers, SBOM. Standard library only."""
