"""Named settings, and settings as text: overrides, JSON, and the hash by which results are found."""
