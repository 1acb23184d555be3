"""The comparison as one offline page (`document`): its numbers, its figures and its template."""
