// Groups, failovers, other frontends.

import { byId, clock, count, duration, h, keyed, ms, setText } from "./dom.js";
import { backAfter, failoverKey } from "./timeline.js";

const FAILOVERS_SHOWN = 50;

function table(id, caption, columns, items, key) {
  const element = byId(id);
  if (element.tHead === null) {
    element.append(h("caption", { class: "unseen" }, caption));
    const names = columns.map(([name, , kind]) => h("th", { scope: "col", class: kind }, name));
    element.append(h("thead", {}, h("tr", {}, ...names)), h("tbody"));
  }
  const makeRow = () => h("tr", {}, ...columns.map(([, , kind], i) => (i ? h("td", { class: kind }) : h("th", { scope: "row" }))));
  keyed(element.tBodies[0], items, key, makeRow, (row, item) => {
    columns.forEach(([, show], i) => show(row.cells[i], item));
  });
}

const text = (show) => (cell, item) => setText(cell, show(item));

function state(cell, group) {
  if (cell.firstElementChild === null) cell.append(h("span"));
  cell.firstElementChild.className = `pill ${group.state}`;
  setText(cell.firstElementChild, group.state);
  cell.title = group.cause ?? "";
}

const GROUPS = [
  ["group", text((g) => g.name)],
  ["state", state],
  ["role", text((g) => g.role)],
  ["epoch", text((g) => String(g.epoch)), "number"],
  ["running", text((g) => count(g.running)), "number"],
  ["queued", text((g) => count(g.queued)), "number"],
  ["shadow to", text((g) => (g.shadow?.to === null || g.shadow?.to === undefined ? "–" : `group ${g.shadow.to}`))],
  ["behind by", text((g) => (g.shadow ? `${count(g.shadow.lag_tokens)} tokens, ${ms(g.shadow.lag_ms)}` : "–")), "number"],
  ["weights", text((g) => g.weight_version ?? "–")],
  ["host", text((g) => (g.link === "local" ? g.host || "here" : `${g.host} (link ${g.link})`))],
  ["ranks", text((g) => g.pids.ranks.join(" ") || "–")],
  ["cause", text((g) => (g.state === "ready" ? "" : g.cause)), "wide"],
];

function when(choose) {
  return (cell, failover) => {
    if (cell.firstElementChild === null) {
      cell.append(h("button", { type: "button", class: "link", onclick: () => choose(failover) }));
    }
    setText(cell.firstElementChild, clock(Date.parse(failover.at)));
  };
}

function back(server, failover) {
  const seconds = backAfter(server, failover);
  return seconds === undefined ? "–" : seconds === null ? "not yet" : duration(seconds);
}

export function drawTables(server, choose) {
  const { groups, failovers, frontends } = server.status;
  table("groups", "Worker groups", GROUPS, groups, (group) => group.id);
  const columns = [
    ["at", when(choose)],
    ["group", text((f) => String(f.group))],
    ["epoch", text((f) => String(f.epoch)), "number"],
    ["cause", text((f) => f.cause), "wide"],
    ["noticed", text((f) => ms(f.detect_ms)), "number"],
    ["moved", text((f) => count(f.redirected)), "number"],
    ["stall, p50", text((f) => ms(f.stall_ms?.p50)), "number"],
    ["longest", text((f) => ms(f.stall_ms?.max)), "number"],
    ["from shadow", text((f) => count(f.restored_tokens)), "number"],
    ["computed again", text((f) => count(f.recomputed_tokens)), "number"],
    ["refused", text((f) => count(f.refused)), "number"],
    ["back after", text((f) => back(server, f)), "number"],
  ];
  table("failovers", "Failovers, the latest first", columns, failovers.slice(-FAILOVERS_SHOWN).reverse(), failoverKey);
  byId("failovers").hidden = failovers.length === 0;
  byId("no-failovers").hidden = failovers.length > 0;
  byId("frontends-part").hidden = frontends.length === 0;
  table("frontends", "Other frontends", [["name", text((f) => f.name)], ["state", text((f) => f.state)], ["address", text((f) => f.url)]],
    frontends, (frontend) => frontend.name);
}
