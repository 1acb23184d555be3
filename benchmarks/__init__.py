"""What `make bench` and `make zoo` run. A package of its own: other distributions install one of this name, too."""
