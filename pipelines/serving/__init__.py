"""A fused model behind OpenAI's API.

requests      the fields of a request, and their limits
limits        how many requests at a time, and how large
answers       replies: whole, or as a stream of events
model_thread  the one thread that answers
page          the page of `meteora chat --web`
host_names    the host names that a server accepts
server        the app and its server
"""
