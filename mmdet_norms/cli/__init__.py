"""What ``tools/*.py`` call, importable, so that an installed package has the same commands."""
