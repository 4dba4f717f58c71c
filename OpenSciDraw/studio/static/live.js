// What the studio sends by itself: on("runs", f) calls f with each new value, and with the last one at once.
const source = new EventSource("/api/events"), last = new Map(), listeners = new Map();
export function on(name, listener) {
  if (!listeners.has(name)) {
    listeners.set(name, new Set());
    source.addEventListener(name, (event) => {
      last.set(name, JSON.parse(event.data));
      for (const one of listeners.get(name)) one(last.get(name));
    });
  }
  listeners.get(name).add(listener);
  if (last.has(name)) listener(last.get(name));
  return () => listeners.get(name).delete(listener);
}
for (const name of ["runs", "queue", "work"]) on(name, () => {});
