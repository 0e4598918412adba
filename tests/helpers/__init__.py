"""What several tests share: small models and data, layouts, a second process, other ways to write a config."""
