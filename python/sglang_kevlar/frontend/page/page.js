// The page: asks its server once a second, and shows what it said.

import { drawChart } from "./charts.js";
import { byId, clock, count, duration, h, keyed, ms, setText } from "./dom.js";
import { Server } from "./server.js";
import { drawTables } from "./tables.js";
import { cost, failoverKey, Timeline } from "./timeline.js";

// columns of a row of /kevlar/history
const FIRST = [["max", "longest", 3], ["p50", "p50", 2]];
const INTER = [["max", "longest wait", 6], ["p99", "p99", 5], ["p50", "p50", 4]];

const timeline = new Timeline();
const server = new Server(draw, askForKey);
// failovers that have been announced; null before the first answer
let announced = null;

function draw() {
  if (server.waitsForKey) return;
  drawConnection();
  if (server.history === null) return;
  byId("key").hidden = true;
  const seconds = Number(document.querySelector("#span input:checked").value);
  const { version, upstream, uptime_s, weights } = server.status;
  const about = [`${version}, SGLang ${upstream}, this frontend is up for ${duration(Math.floor(uptime_s))}`];
  if (weights?.state === "running") {
    about.push(`weights of ${weights.model_path}, group by group: ${weights.doing}`);
  }
  setText(byId("about"), about.join("; "));
  drawTiles();
  timeline.draw(server, seconds);
  drawChart("first", server, seconds, FIRST);
  drawChart("inter", server, seconds, INTER);
  drawTables(server, (failover) => timeline.choose(failover));
  if (server.silentSince === null) announce();
}

function drawConnection() {
  const pill = byId("connection");
  const silent = server.silentSince !== null;
  pill.className = `pill ${silent ? "down" : "ready"}`;
  pill.title = server.problem;
  setText(pill, silent ? `server not answering since ${clock(server.silentSince)}` : "live");
  document.body.classList.toggle("stale", silent);
  document.title = `${silent ? "not answering" : served()} - SGLang-Kevlar`;
}

function served() {
  const groups = server.status?.groups ?? [];
  return `${groups.filter((group) => group.state === "ready").length} of ${groups.length}`;
}

function drawTiles() {
  const { groups, held } = server.status;
  const { rolling } = server.history;
  // "15 / 108 ms": one unit is enough where it is the same.
  const both = (latency) => {
    const [p50, p99] = [ms(latency.p50), ms(latency.p99)];
    const unit = / (ms|s)$/.exec(p99)?.[0];
    return `${unit && !p50.startsWith("<") && p50.endsWith(unit) ? p50.slice(0, -unit.length) : p50} / ${p99}`;
  };
  const tiles = [
    ["groups that serve", served()],
    ["requests running", count(groups.reduce((sum, group) => sum + group.running, 0))],
    ["waiting for a group", count(held)],
    ["tokens a second", count(rolling.tokens_per_s)],
    ["first token, p50 / p99", both(rolling.first_token_ms)],
    ["per token, p50 / p99", both(rolling.inter_token_ms)],
    ["longest wait, 1 min", ms(rolling.inter_token_ms.max)],
  ];
  keyed(byId("tiles"), tiles, (tile) => tile[0],
    (tile) => h("div", {}, h("dt", {}, tile[0]), h("dd")),
    (element, tile) => setText(element.lastElementChild, tile[1]));
}

function announce() {
  const { failovers } = server.status;
  // Not before it is known what it cost.
  const through = failovers.filter((failover) => failover.pending === 0);
  if (announced === null) announced = new Set(through.map(failoverKey));
  const news = through.filter((failover) => !announced.has(failoverKey(failover)));
  announced = new Set(through.map(failoverKey));
  if (news.length) {
    setText(byId("news"), news.map((one) => `Group ${one.group} was lost: ${one.cause}. ${cost(one)}.`).join(" "));
  }
}

function askForKey(refused) {
  byId("key").hidden = false;
  setText(byId("key-problem"), refused ? "The server does not accept this key." : "");
  setText(byId("connection"), "key wanted");
  byId("key-input").focus();
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("key-input");
  const key = input.value;
  input.value = "";
  server.useKey(key);
});
byId("span").addEventListener("change", draw);
server.run();
