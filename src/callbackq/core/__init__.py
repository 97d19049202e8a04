"""
The core decides. It holds no socket, file, thread or clock: time and chance come in as arguments.

`models` say what a callback is, `retry` when its next attempt is due, `verdict` what an answer means,
`lifecycle` what state follows, `planning` what a dispatcher does next, `url` and `targets` what may be
called, `exchange` how one request and its answer look as bytes, `jsontext` and `documents` how strictly JSON is read.
"""
