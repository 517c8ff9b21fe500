"""The endpoint of `moss-audio serve`: OpenAI's HTTP interface to engines. Needs the extra `serve`.

command         options, loading, the server's life
app             routes, and what every request passes: key, draining, size of its body
service         models by name, each an engine; the bound of their queues
answers         answers of an engine, as asyncio awaits them
chat            /v1/chat/completions
chat_body       its body
transcriptions  /v1/audio/transcriptions: windows of a recording, joined
transcript      its form, and its formats
timelines       /v1/timelines
media           where a clip comes from, and how much of it is decoded
fetching        clips from https, of allowed hosts alone
events          server-sent events, and clients that leave
limits          what a request may cost
errors          errors as OpenAI's clients expect them
metrics         counters for Prometheus
page            the page for a browser: its files, and the routes that serve them
"""
