"""One file per conversion method."""
