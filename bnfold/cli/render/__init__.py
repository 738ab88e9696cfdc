"""Reports for readers: a terminal, Markdown, HTML, JUnit, GitHub."""
