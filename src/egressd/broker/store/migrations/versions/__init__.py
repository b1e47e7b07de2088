"""Each revision, by number. One that was released is never edited."""
