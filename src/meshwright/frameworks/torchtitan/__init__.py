"""torchtitan: its command line (August 2026) and the TOML files of earlier releases."""
