"""Which values to try: named spaces (YAML) and recipes."""
