"""What is known of a conversion before its work: what is refused, and how many FLOPs and bytes each phase takes."""
