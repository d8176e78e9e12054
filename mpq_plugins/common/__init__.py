"""Files, locks, progress, plug-ins by name: what every stage uses."""
