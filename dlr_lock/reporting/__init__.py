"""Results as sections, and what renders them: console, HTML and Markdown."""
