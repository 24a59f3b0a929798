"""One color for a method in every picture."""

HIFICL = "#1f6fb4"
LORA = "#e08a1e"
PREFIX = "#6aa84f"
GREY = "#9a9a9a"  # whatever is not an adapter
