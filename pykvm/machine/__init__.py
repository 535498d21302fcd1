"""Virtual machines, assembled from the packages of the lower layers."""
