"""What a conversion will take, before it starts: counted from a model's config and the headers of its weight files."""
