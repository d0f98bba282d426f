"""What a request will take, said before it runs: step times, the queue run forward, intervals. No torch in here."""
