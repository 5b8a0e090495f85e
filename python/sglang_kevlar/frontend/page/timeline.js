// One row a group: its states over time, and a mark for each failover.

import { byId, clock, count, duration, h, keyed, ms, setText } from "./dom.js";

const TICK_WIDTH = 76;

export const STATES = ["ready", "starting", "suspect", "draining", "down", "gone"];

// Seconds from a failover until its group served again; null while it does not, undefined when that is not known.
export function backAfter(server, failover) {
  const group = server.history.groups.find((one) => one.group === failover.group);
  const lost = Date.parse(failover.at);
  if (group === undefined || server.wall(group.changes[0][0]) > lost) return undefined;
  for (const [at, state, epoch] of group.changes) {
    if (epoch > failover.epoch && state === "ready") return Math.max(0, (server.wall(at) - lost) / 1000);
  }
  return null;
}

export function cost(failover) {
  const parts = [`${failover.redirected} moved`];
  if (failover.stall_ms) parts.push(`stood still ${ms(failover.stall_ms.p50)} (longest ${ms(failover.stall_ms.max)})`);
  if (failover.recomputed_tokens) parts.push(`${count(failover.recomputed_tokens)} tokens computed again`);
  if (failover.refused) parts.push(`${failover.refused} refused`);
  return parts.join(", ");
}

export const failoverKey = (failover) => `${failover.at} ${failover.group} ${failover.epoch}`;

export class Timeline {
  #chosen = null;
  #server = null;

  constructor() {
    byId("legend").append(...STATES.map((state) => h("li", {}, h("span", { class: `swatch ${state}` }), state)));
    byId("legend").append(h("li", {}, h("span", { class: "mark-sample", "aria-hidden": "true" }), "failover"));
  }

  draw(server, seconds) {
    this.#server = server;
    const end = server.now();
    const begin = end - seconds * 1000;
    const place = (wall) => `${(100 * (Math.min(end, Math.max(begin, wall)) - begin)) / (end - begin)}%`;
    const names = new Map(server.status.groups.map((group) => [group.id, group.name]));
    const rows = server.history.groups.map((one) => ({
      group: one.group,
      name: names.get(one.group) ?? String(one.group),
      spans: spans(server, one.changes, begin, end),
      failovers: server.status.failovers.filter((f) => f.group === one.group && Date.parse(f.at) >= begin),
    }));
    keyed(byId("timeline"), [...rows, { group: "axis" }], (row) => row.group, makeRow, (element, row) => {
      if (row.group === "axis") drawAxis(element.querySelector(".track"), begin, end, place);
      else this.#drawRow(element, row, place);
    });
    this.#drawDetail();
  }

  choose(failover) {
    const key = failoverKey(failover);
    this.#chosen = this.#chosen === key ? null : key;
    this.#drawDetail();
  }

  #drawRow(element, row, place) {
    setText(element.querySelector(".name"), `group ${row.name}`);
    const last = row.spans.at(-1);
    const track = element.querySelector(".spans");
    track.setAttribute("aria-label", `now ${last?.state ?? "unknown"}, ${row.failovers.length} failovers`);
    keyed(track, row.spans, (s) => s.key, () => h("span"), (span, s) => {
      span.className = `span ${s.state}`;
      span.title = `${s.state}, epoch ${s.epoch}, since ${clock(s.since)}`;
      span.style.left = place(s.from);
      span.style.width = `calc(${place(s.to)} - ${place(s.from)})`;
    });
    keyed(element.querySelector(".marks"), row.failovers, failoverKey, (f) => h("button", {
      type: "button", class: "mark", onclick: () => this.choose(this.#current(failoverKey(f)) ?? f),
    }), (button, f) => {
      const text = `${clock(Date.parse(f.at))}: group ${row.name} lost (${f.cause}); ${cost(f)}`;
      button.title = text;
      button.setAttribute("aria-label", text);
      button.setAttribute("aria-pressed", String(this.#chosen === failoverKey(f)));
      button.style.left = place(Date.parse(f.at));
    });
  }

  #current(key) {
    return this.#server?.status.failovers.find((f) => failoverKey(f) === key);
  }

  #drawDetail() {
    const panel = byId("detail");
    const failover = this.#chosen === null ? undefined : this.#current(this.#chosen);
    panel.hidden = failover === undefined;
    for (const mark of document.querySelectorAll(".mark")) {
      mark.setAttribute("aria-pressed", String(mark.dataset.key === this.#chosen));
    }
    if (failover === undefined) return;
    if (panel.firstElementChild === null) panel.append(h("h3"), h("dl"));
    const back = backAfter(this.#server, failover);
    setText(panel.firstElementChild, `Group ${failover.group}, epoch ${failover.epoch}: ${failover.cause}`);
    const facts = [
      ["when", new Date(failover.at).toLocaleString("en-GB")],
      ["kind", failover.kind],
      ["noticed after", ms(failover.detect_ms)],
      ["requests moved", count(failover.redirected)],
      ["stood still", failover.stall_ms ? `${ms(failover.stall_ms.p50)} (p50), ${ms(failover.stall_ms.max)} (longest)` : "–"],
      ["KV found elsewhere", `${count(failover.restored_tokens)} tokens`],
      ["computed again", `${count(failover.recomputed_tokens)} tokens`],
      ["had to wait for a group", count(failover.held)],
      ["refused", count(failover.refused)],
      ["not through yet", count(failover.pending)],
      ["group serves again", back === undefined ? "not known" : back === null ? "not yet" : `after ${duration(back)}`],
    ];
    keyed(panel.lastElementChild, facts, (fact) => fact[0],
      (fact) => h("div", {}, h("dt", {}, fact[0]), h("dd")),
      (element, fact) => setText(element.lastElementChild, fact[1]));
  }
}

function spans(server, changes, begin, end) {
  return changes.map(([at, state, epoch], i) => {
    const since = server.wall(at);
    const to = i + 1 < changes.length ? server.wall(changes[i + 1][0]) : end;
    return { key: `${at} ${epoch} ${state}`, state, epoch, since, from: Math.max(begin, since), to };
  }).filter((span) => span.to > begin);
}

function makeRow(row) {
  if (row.group === "axis") {
    return h("div", { class: "row axis", "aria-hidden": "true" }, h("span", { class: "name" }), h("div", { class: "track" }));
  }
  const track = h("div", { class: "track" }, h("div", { class: "spans", role: "img" }), h("div", { class: "marks" }));
  return h("div", { class: "row" }, h("span", { class: "name" }), track);
}

function drawAxis(track, begin, end, place) {
  const steps = [10, 30, 60, 120, 300].map((seconds) => seconds * 1000);
  const room = track.clientWidth / TICK_WIDTH;
  const step = steps.find((one) => (end - begin) / one <= room) ?? steps.at(-1);
  const ticks = [];
  for (let tick = Math.ceil(begin / step) * step; tick <= end - ((end - begin) * 0.7) / room; tick += step) ticks.push(tick);
  keyed(track, ticks, (tick) => tick, (tick) => h("span", { class: "tick" }, clock(tick)), (element, tick) => {
    element.style.left = place(tick);
  });
}
