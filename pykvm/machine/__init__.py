"""Virtual machines, put together from the packages below."""
