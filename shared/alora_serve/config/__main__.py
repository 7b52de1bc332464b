"""Prints the settings as a Markdown document body: ``python -m alora_serve.config``."""

from alora_serve.config.reference import configuration_table

if __name__ == "__main__":
    print(configuration_table(), end="")
