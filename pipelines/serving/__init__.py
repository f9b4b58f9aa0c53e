"""A fused model behind the chat API of OpenAI, for clients that speak it.

requests      what a client may ask, and what is refused
answers       what it gets: whole, or as a stream of events
model_thread  the one thread that answers
page          the page of `meteora chat --web`
host_names    the names under which it answers
server        the app, and how it is served
"""
