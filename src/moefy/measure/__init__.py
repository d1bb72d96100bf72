"""What a conversion costs and gives: quality, speed, comparisons, a search for a promised loss."""
