// What this page knows of its server: asked once a second, one question after the other.

const INTERVAL = 1000;
const HIDDEN_INTERVAL = 10000;
const TIMEOUT = 5000;

class KeyWanted extends Error {}

export class Server {
  status = null;
  // by second: the rows of /kevlar/history
  seconds = new Map();
  history = null;
  // since when it has not answered (this browser's clock), and why
  silentSince = null;
  problem = "";
  // nothing is asked until there is one
  waitsForKey = false;
  #key = "";
  #wake = null;

  // `changed`: after each try. `keyWanted(refused)`: the server wants another key than the one it got, if any.
  constructor(changed, keyWanted) {
    this.changed = changed;
    this.keyWanted = keyWanted;
  }

  // Kept in this page's memory only.
  useKey(key) {
    this.#key = key;
    this.#wake?.();
  }

  async run() {
    document.addEventListener("visibilitychange", () => document.hidden || this.#wake?.());
    for (;;) {
      try {
        await this.#look();
        this.silentSince = null;
        this.problem = "";
      } catch (error) {
        if (error instanceof KeyWanted) {
          this.waitsForKey = true;
          this.keyWanted(this.#key !== "");
          await new Promise((resolve) => { this.#wake = resolve; });
          this.waitsForKey = false;
          continue;
        }
        this.silentSince ??= Date.now();
        this.problem = error.name === "TimeoutError" ? `no answer within ${TIMEOUT / 1000} s` : error.message;
      }
      this.changed();
      const pause = document.hidden ? HIDDEN_INTERVAL : INTERVAL;
      await new Promise((resolve) => { this.#wake = resolve; setTimeout(resolve, pause); });
    }
  }

  async #look() {
    const status = await this.#ask("status");
    const last = Math.max(-1, ...this.seconds.keys());
    const history = await this.#ask(`history?instance=${this.history?.instance ?? ""}&after=${last}`);
    if (history.instance !== this.history?.instance) this.seconds.clear();
    for (const row of history.seconds) this.seconds.set(row[0], row);
    for (const second of this.seconds.keys()) {
      if (second < history.now - history.window_s) this.seconds.delete(second);
    }
    this.status = status;
    this.history = history;
  }

  async #ask(path) {
    const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    const options = { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT) };
    const response = await fetch(path, options);
    if (response.status === 401 || response.status === 403) throw new KeyWanted();
    if (!response.ok) throw new Error(`${path.split("?")[0]} answers ${response.status}`);
    return await response.json();
  }

  // The server's wall clock (ms) at a monotonic second of its history.
  wall(second) {
    return Date.parse(this.history.at) + (second - this.history.now) * 1000;
  }

  now() {
    return Date.parse(this.history.at);
  }
}
