"""Settings: one registry of keys (`registry`), the frozen values (`values`), and how they are loaded (`load`)."""
