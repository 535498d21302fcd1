"""Programs that measurements run in Linux guests; their sources are handed over as text."""
