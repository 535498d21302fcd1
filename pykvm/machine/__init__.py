"""Virtual machines made of the rest."""
