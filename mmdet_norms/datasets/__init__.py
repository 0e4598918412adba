"""Datasets that come with the package; each is generated, nothing is downloaded."""
